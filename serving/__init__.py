"""What happens with a Bundle: batch scoring and the MLflow model."""
