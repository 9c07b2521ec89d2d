"""What regenerates every table of the documentation, and the baselines that NeuMF is measured beside."""
