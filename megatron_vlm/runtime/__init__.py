"""Devices, ranks, collectives, seeds, logging: what the rest of the package stands on."""
