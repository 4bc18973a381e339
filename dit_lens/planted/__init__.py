"""Models with a circuit that is known by construction: a ground truth for methods that find
circuits.
"""

from __future__ import annotations

from .build import planted_circuit
from .truth import Kind, PlantedEdge, PlantedHead, PlantedTruth

__all__ = ["Kind", "PlantedEdge", "PlantedHead", "PlantedTruth", "planted_circuit"]
