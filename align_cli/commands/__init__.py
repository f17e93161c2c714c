"""The commands of `align` that are not `train`: each module reads its arguments and prints."""
