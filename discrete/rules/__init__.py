"""Update rules x_{k+1} = G_k(x_k): methods for a flow, algorithms, the optimisers of torch."""
