"""One small file per source of raw pairs: each has a build command whose `pairs` lists them lazily."""
