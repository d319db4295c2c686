"""What weights say and what features do: functions of tensors and models."""
