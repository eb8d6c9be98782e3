"""The paper's experiments, their data and their figures. Never imported by the core."""
