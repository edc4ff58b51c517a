"""Train compressed networks with their supports fixed."""
