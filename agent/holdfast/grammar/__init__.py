"""The small languages of the field, each read and written in one place: images, signals, sizes, sysctls and so on.

State files, agent.toml, the command line and drivers all ask here. Every reader takes what was written and returns a
value or its canonical spelling, or raises ValueError with what is wrong and what would be right.
"""
