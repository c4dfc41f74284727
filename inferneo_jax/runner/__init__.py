"""What is compiled and dispatched: backends, programs, inputs and the runner."""
