"""The registered methods: each a short list of phases."""
