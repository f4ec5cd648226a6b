"""Where in the loop of a framework or trainer we are called."""
