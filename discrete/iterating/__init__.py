"""The iteration itself: the update on flat vectors, its loop, and the states that it keeps."""
