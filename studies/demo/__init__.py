"""What only the demo and the table of models need: stages, picture, report, and the export against training."""
