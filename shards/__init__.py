"""Make data sets of WebDataset tars with a manifest, and look into them: build, verify, stats, index, features."""
