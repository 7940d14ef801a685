"""What a run tells of itself: defined (metrics.py), kept by each process (board.py), served to Prometheus (exporter.py)."""
