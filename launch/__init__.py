"""From a laptop to a cluster: TorchX components, the scheduler that writes a Kubernetes Job, the program that each node runs."""
