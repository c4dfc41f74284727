"""The layers of models, in their reference form for any device: pure functions of arrays."""
