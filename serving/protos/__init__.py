"""The modules beside this one are generated from protos/ by scripts/generate_protos.py (`make protos`): do not edit."""
