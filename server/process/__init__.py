"""The server as a process: listening, shutdown, child servers, replicas."""
