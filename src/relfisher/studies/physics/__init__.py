"""Problems whose training loss is the accuracy: differential equations, and the race on them at equal time."""
