"""What is made of a daemon's status by those who look again and again, and what Prometheus and Grafana are told."""
