"""The campaign's parts.

    planned    the runs that the project is made of, in the order to do them
    workers    where they are computed: processes of this machine, or a Ray cluster
"""
