"""Pictures: graphs in the paper's colours, training curves, accuracies, statistics."""
