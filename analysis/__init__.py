"""What it means: metrics, comparisons, pictures and exports of timelines."""
