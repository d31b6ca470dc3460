"""The ensemble: specification, modules, local training, encoding. Knows nothing of federation."""
