"""Public helpers for testing: simulated upstreams with faults, and the schedule explorer."""
