"""The parts that models are made of. Every one is pure: arrays in, arrays out."""
