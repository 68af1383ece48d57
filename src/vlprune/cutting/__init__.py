"""Making a plan true: gates, shared weights, and the cut itself with its proof."""
