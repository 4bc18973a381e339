"""Interventions as data, and experiments made of them: ablation and steering."""
