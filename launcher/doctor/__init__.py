"""`samestep doctor`: what this machine offers to a run, measured, judged, and with a hint where something is amiss."""
