"""From a cache to a cross-layer transcoder. Imports neither transformers nor datasets nor harvest."""
