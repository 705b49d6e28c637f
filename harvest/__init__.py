"""From a model and a dataset to a cache: the only importer of transformers and datasets, never of train."""
