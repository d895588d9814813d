"""Using a trained model: documents compressed, questions answered."""
