"""Is the specialist better? Systems side by side, measures with intervals, the report, the blind reading. May
import everything in this package but training."""
