"""First times: the criterion watched along the steps. Knows no gradients."""
