"""Paths through the model: nodes, path patching, attribution, faithfulness of circuits."""
