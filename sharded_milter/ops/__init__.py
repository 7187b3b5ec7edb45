"""Running the service: configuration, logs."""
