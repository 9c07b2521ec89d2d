"""Files that may be damaged or hostile: pickles, checkpoints and YAML, checked before anything is made of them."""
