"""Raw pairs -> WebDataset tars with a manifest: build, verify, stats, index, features."""
