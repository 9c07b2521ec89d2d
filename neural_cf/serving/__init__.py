"""Using a trained model elsewhere: exporting it, running exported files, and recommending items to users."""
