"""From a model and a dataset to a cache. The only importer of transformers and datasets; never imports train."""
