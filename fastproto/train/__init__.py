"""The reference trainer: data, encoders, methods, one loop, evaluation, checkpoints and the report."""
