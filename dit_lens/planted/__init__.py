"""Models with a circuit known by construction: a ground truth for circuit-finding methods."""

from __future__ import annotations

from .build import planted_circuit
from .truth import Kind, PlantedEdge, PlantedHead, PlantedTruth

__all__ = ["Kind", "PlantedEdge", "PlantedHead", "PlantedTruth", "planted_circuit"]
