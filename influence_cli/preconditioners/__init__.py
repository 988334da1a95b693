"""Maps M with score = query . M . gradient, fitted to training gradients by passes over them."""
