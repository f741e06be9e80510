"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something that a person can mend.

    Its message is one sentence that names the file or the flag, says what was found and what to do. The command line
    prints it alone and ends with exit code 2; in Python it is raised as it is.
    """
