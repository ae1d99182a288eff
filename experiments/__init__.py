"""Commands and scripts around the method: the demo, the claims, sweeps, diagnosis, speed and cost."""
