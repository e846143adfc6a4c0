"""Runs on TPUs of Google Cloud: `pod` has one slice to itself, `jobset` asks Kubernetes (GKE)."""
