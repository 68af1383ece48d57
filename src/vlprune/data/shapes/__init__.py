"""Generated data: scenes of coloured shapes, written in the format of every data set we read."""
