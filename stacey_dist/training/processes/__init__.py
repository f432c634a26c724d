"""The processes of a run: how they join and reach an engine, notice each other's failures, stop and end."""
