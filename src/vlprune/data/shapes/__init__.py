"""Generated scenes of coloured shapes, written in a format for every task."""
