"""From a recipe to a folder, and the work of commands on a folder that exists.

``compress`` lists the steps of a run as verbs; the files beside it hold one step each. Nothing is
imported here: a command imports the files that it needs, and answers sooner.
"""
