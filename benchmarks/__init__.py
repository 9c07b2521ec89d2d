"""Scripts that regenerate every table of the documentation, and the baselines that NeuMF is compared with."""
